"""The kinds of store behind a cache, and the commit protocol that they share."""
