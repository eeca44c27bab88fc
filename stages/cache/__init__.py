"""The feature cache: one directory, one fingerprint, one Zarr group per video, and a commit record that decides.

Importing this loads numpy and pydantic; zarr is loaded by the first write, h5py by the first use of an HDF5 export.
"""

from stages.cache.feature_cache import CachedFrames, FeatureCache
from stages.cache.files.errors import CacheWriteError, DamagedCacheError, MissingFramesError
from stages.cache.fingerprint import Fingerprint
from stages.cache.ledger import FailedVideo, Ledger, LedgerStatus, LedgerWriter
from stages.cache.maintenance import CacheInfo, CheckResult, SweepReport
from stages.cache.storage import STORAGE_FIELD, STORAGE_TYPES, StorageType, storage_type, widen
from stages.cache.stores.commit import CommitRecord

__all__ = [
    "STORAGE_FIELD",
    "STORAGE_TYPES",
    "CacheInfo",
    "CacheWriteError",
    "CachedFrames",
    "CheckResult",
    "CommitRecord",
    "DamagedCacheError",
    "FailedVideo",
    "FeatureCache",
    "Fingerprint",
    "Ledger",
    "LedgerStatus",
    "LedgerWriter",
    "MissingFramesError",
    "StorageType",
    "SweepReport",
    "storage_type",
    "widen",
]
