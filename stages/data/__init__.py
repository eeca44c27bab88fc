"""Cards, annotations, manifests and frame plans; getting a data set's files in place."""
