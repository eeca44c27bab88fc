"""One cache, one fingerprint: what counts as equal, and what each kind of wrong file says."""

import json

import pytest

from stages.cache.files.files import Directory
from stages.cache.fingerprint import Fingerprint, fingerprint_content, load_fingerprint
from stages.cache.stores.commit import FILE_NAME
from stages.errors import UserError

FIELDS = {"encoder": "eva-g", "layer": 38, "scale": 0.18215, "crop": False, "pooling": None, "storage": "float16"}


@pytest.fixture
def cache(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(fingerprint_content(Fingerprint(fields=FIELDS)))
    return tmp_path


def change(cache, **changes):
    path = cache / "fingerprint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_saved_fingerprint_is_read_back_with_the_types_of_its_values(cache):
    read = load_fingerprint(Directory(cache))
    assert read == Fingerprint(fields=FIELDS)
    assert [type(value) for value in read.fields.values()] == [str, int, float, bool, type(None), str]


def test_the_digest_is_the_sha256_of_the_canonical_json_of_the_fields():
    # printf '%s' '{"a":1,"b":"x"}' | sha256sum
    expected = "ecf9e98ec0641e23113ff3ce8bdc78d0ddd249886517fd4a7f68cc83d4e65667"
    assert Fingerprint(fields={"b": "x", "a": 1}).digest == expected


@pytest.mark.parametrize("value", [1.0, True, "1", None, 2])
def test_values_that_only_look_like_one_give_another_digest_and_a_difference(value):
    one, other = Fingerprint(fields={"layer": 1}), Fingerprint(fields={"layer": value})
    assert one.digest != other.digest
    assert one.differences(other) == [("layer", 1, value)]


def test_differences_name_fields_that_either_side_lacks():
    mine, theirs = Fingerprint(fields={"a": 1, "b": 2}), Fingerprint(fields={"b": 2, "c": 3})
    assert mine.differences(theirs) == [("a", 1, "(absent)"), ("c", "(absent)", 3)]


def test_a_mismatch_names_the_first_field_both_values_and_the_way_out():
    with pytest.raises(UserError) as error:
        Fingerprint(fields=FIELDS).require_match(Fingerprint(fields={**FIELDS, "layer": 37, "crop": True}), "/c")
    assert str(error.value) == (
        "/c: this cache was made with another layer (and 1 more fields); got 38; allowed: 37. "
        "Give another --cache directory, or the preset that this cache was made with"
    )


def test_a_partial_mapping_is_compared_on_its_own_fields_only():
    fingerprint = Fingerprint(fields=FIELDS)
    fingerprint.require_match({"layer": 38, "encoder": "eva-g"}, "/c")
    with pytest.raises(UserError, match=r"another encoder; got 'eva-g'; allowed: 'clip-b'"):
        fingerprint.require_match({"layer": 38, "encoder": "clip-b"}, "/c")
    with pytest.raises(UserError, match=r"another teacher; got '\(absent\)'; allowed: 'dit-xl'"):
        fingerprint.require_match({"teacher": "dit-xl"}, "/c")


def test_numbers_that_json_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="finite"):
        Fingerprint(fields={"scale": float("nan")})


def test_a_file_edited_by_hand_is_refused(cache):
    change(cache, fields={**FIELDS, "layer": 12})
    with pytest.raises(UserError, match=r"fingerprint\.json: the digest does not belong to the fields"):
        load_fingerprint(Directory(cache))


def test_a_file_of_another_format_version_is_refused(cache):
    change(cache, format_version=2, new_key=1)
    with pytest.raises(UserError, match=r"another format version; got 2; allowed: 1"):
        load_fingerprint(Directory(cache))


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"format_version": 1, "fields": {"a": [1]}, "digest": ""}', "null"]
)
def test_a_broken_file_is_one_clear_error_with_its_name(cache, content):
    (cache / "fingerprint.json").write_text(content)
    with pytest.raises(UserError, match=r"fingerprint\.json"):
        load_fingerprint(Directory(cache))


def test_a_directory_without_fingerprint_is_no_cache(tmp_path):
    with pytest.raises(UserError, match=r"no feature cache here .*Run `pipeline extract` first"):
        load_fingerprint(Directory(tmp_path))
