"""What runs: manifests, decoding, extraction, the feature cache, datasets, training, evaluation."""
