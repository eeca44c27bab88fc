"""The caches of a study: members whose features are the same share one, and each is extracted at most once."""

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.commands import extract
from pipeline.runs.cached_data import cached_samples, open_cache
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig, Resolved
from pipeline.studies.members import Training
from stages.errors import UserError


@dataclass(frozen=True)
class StudyCache:
    """One cache, and whether it lacks what the study reads; `fingerprint` is None while there is no cache."""

    root: str
    fingerprint: str | None
    missing: bool


def caches_of(trainings: Iterable[Training]) -> list[StudyCache]:
    """The caches as they are."""
    return [_look_at(root, configs) for root, configs in _by_root(trainings).items()]


def extract_missing(trainings: Iterable[Training], *, address: str | None, retry_failed: bool) -> list[StudyCache]:
    """Extract what is not in the caches, then check that all of it is there.

    Raises:
        UserError: a cache was made with other networks than its members', or videos or annotations are missing.
    """
    found = []
    for root, configs in _by_root(trainings).items():
        for config in configs:
            if not _is_complete(config):
                extract.run(Resolved(config, {}), address=address, retry_failed=retry_failed, as_json=False)
        for config in configs:
            _require_complete(config)
        found.append(_look_at(root, configs))
    fingerprints = [cache.fingerprint for cache in found]
    assert len(set(fingerprints)) == len(found), "two caches of one study hold the same features"
    return found


def _by_root(trainings: Iterable[Training]) -> dict[str, list[PipelineConfig]]:
    """For each cache, one configuration of every kind of demand on it: networks and samples."""
    groups: dict[str, dict[str, PipelineConfig]] = {}
    for one in trainings:
        demand = "".join(getattr(one.config, branch).model_dump_json() for branch in ("encoder", "teacher", "data"))
        distils = f"{one.config.alignment.kd_weight > 0}"
        groups.setdefault(str(locations.cache_root(one.config)), {}).setdefault(demand + distils, one.config)
    return {root: list(configs.values()) for root, configs in groups.items()}


def _look_at(root: str, configs: list[PipelineConfig]) -> StudyCache:
    try:
        fingerprint = open_cache(configs[0]).fingerprint.digest
    except UserError:
        return StudyCache(root, None, missing=True)
    return StudyCache(root, fingerprint, missing=not all(map(_is_complete, configs)))


def _is_complete(config: PipelineConfig) -> bool:
    try:
        _require_complete(config)
    except UserError:
        return False  # if it is no lack of features, the extraction says what it is
    return True


def _require_complete(config: PipelineConfig) -> None:
    """UserError unless the fingerprint fits and the ledger leaves no planned video open."""
    cached_samples(open_cache(config), locations.manifest_of(config))
