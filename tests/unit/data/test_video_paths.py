"""Where a manifest's paths may lead: below the videos root, or to addresses of the protocols that are allowed."""

from pathlib import Path

import pytest

from stages.config import ExtractConfig
from stages.data.video_paths import join_video_path, videos_root
from stages.errors import UserError
from stages.urls import is_url

USUAL = ExtractConfig().protocols


def join(root, path, protocols=USUAL):
    return join_video_path(videos_root(root), path, protocols, video="v1")


@pytest.mark.parametrize(
    ("root", "path", "expected"),
    [
        ("/films", "a.mp4", "/films/a.mp4"),
        ("/films", "a/b c.mp4", "/films/a/b c.mp4"),
        ("/films", "/films/a.mp4", "/films/a.mp4"),
        ("/films", "file:///films/a%20b.mp4", "/films/a b.mp4"),
        ("file:///films", "a.mp4", "/films/a.mp4"),
        ("/films", "..a.mp4", "/films/..a.mp4"),
        ("/films", "http:/a.mp4", "/films/http:/a.mp4"),
        ("/films", "https://host/a.mp4?signature=x", "https://host/a.mp4?signature=x"),
        ("/films", "s3://bucket/a.mp4", "s3://bucket/a.mp4"),
        ("s3://bucket/films/", "a b#1.mp4", "s3://bucket/films/a b#1.mp4"),
        ("https://host/films", "a b#1?.mp4", "https://host/films/a%20b%231%3F.mp4"),
        ("https://host/films", "%2e%2e/a.mp4", "https://host/films/%252e%252e/a.mp4"),
        ("ftp://host/films", "ftp://host/films/a.mp4", "ftp://host/films/a.mp4"),
    ],
)
def test_a_path_that_stays_within_is_joined(root, path, expected):
    assert join(root, path) == expected


def test_a_relative_root_becomes_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert join("films", "a.mp4") == str(tmp_path / "films" / "a.mp4")
    assert join("films", str(tmp_path / "films" / "a.mp4")) == str(tmp_path / "films" / "a.mp4")


@pytest.mark.parametrize(
    ("root", "path", "words"),
    [
        ("/films", "../a.mp4", "must stay below the videos folder"),
        ("/films", "a/../../b.mp4", "must stay below the videos folder"),
        ("s3://bucket/films", "../a.mp4", "must stay below the videos folder"),
        ("/films", "/etc/passwd", "outside the videos folder"),
        ("/films", "/films/../etc/passwd", "outside the videos folder"),
        ("/films", "/films2/a.mp4", "outside the videos folder"),
        ("/films", "file:///etc/passwd", "outside the videos folder"),
        ("/films", "file:///films/%2e%2e/etc/passwd", "outside the videos folder"),
        ("/films", "local:///etc/passwd", "outside the videos folder"),
        ("s3://bucket/films", "/etc/passwd", "outside the videos folder"),
        ("s3://bucket/films", "file:///etc/passwd", "outside the videos folder"),
        ("/films", "ftp://host/a.mp4", "no such address may be fetched"),
        ("/films", "sftp://host/a.mp4", "no such address may be fetched"),
        ("ftp://host/films", "ftp://host/films/../a.mp4", "no such address may be fetched"),
        ("ftp://host/films", "ftp://host/films/%2e%2e/a.mp4", "no such address may be fetched"),
        ("ftp://host/films", "ftp://host/filmsx/a.mp4", "no such address may be fetched"),
        ("/films", "simplecache::s3://bucket/a.mp4", "no address of a video"),
        ("/films", "zip://a.mp4::https://host/a.zip", "no address of a video"),
        ("/films", "s3://bucket/a::b", "no address of a video"),
        ("/films", "https://", "no address of a video"),
        ("/films", "memory://a.mp4", "nothing that another process could read"),
    ],
)
def test_a_path_that_leads_elsewhere_is_refused_with_the_video_named(root, path, words):
    with pytest.raises(UserError, match=words) as caught:
        join(root, path)
    assert "path of video 'v1'" in str(caught.value)


def test_a_signature_is_not_repeated():
    with pytest.raises(UserError) as caught:
        join("/films", "ftp://host/a.mp4?signature=secret")
    assert "ftp://host/a.mp4" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_the_protocols_are_what_the_key_says():
    assert join("/films", "/elsewhere/a.mp4", ("file",)) == "/elsewhere/a.mp4"
    assert join("/films", "file:///elsewhere/a.mp4", ("file",)) == "/elsewhere/a.mp4"
    assert join("/films", "ftp://host/a.mp4", ("ftp",)) == "ftp://host/a.mp4"
    with pytest.raises(UserError, match="addresses of no protocol"):
        join("/films", "https://host/a.mp4", ())


def test_a_link_below_the_root_is_followed(tmp_path):
    (tmp_path / "disk2").mkdir()
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "more").symlink_to(tmp_path / "disk2")
    assert join(tmp_path / "films", "more/a.mp4") == str(tmp_path / "films" / "more" / "a.mp4")


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("simplecache::s3://bucket", "no address of a video"),
        ("s3://", "no address of a video"),
        ("memory://films", "nothing that another process could read"),
        ("https://user:secret@host/films", "refused, because it would be written into"),
        ("https://host/films?key=secret", "refused, because it would be written into"),
    ],
)
def test_a_root_that_is_no_place_is_refused(named, words):
    with pytest.raises(UserError, match=words) as caught:
        videos_root(named)
    assert "secret" not in str(caught.value)


def test_folders_and_addresses_are_told_apart():
    assert videos_root("data/lvu") == Path("data/lvu")
    assert videos_root("s3://bucket/lvu/") == "s3://bucket/lvu"
    assert [is_url(text) for text in ("a::b.mp4", "C:/a.mp4", "a.mp4", "/a://b", "x://y")] == [
        True,
        False,
        False,
        False,
        True,
    ]
