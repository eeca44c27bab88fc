"""What the commit records of a cache hold."""

from stages.cache.stores.commit import load_record


def records_of(cache):
    """The commit record of each video, sorted by id."""
    return [load_record(cache.store, video) for video in cache.video_ids()]
