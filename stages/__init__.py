"""What runs: manifests, decoding, extraction, the feature cache, datasets, training, evaluation."""

import logging

# Where bitsandbytes is installed, diffusers imports it. On some processors it then tells of a faster kernel, whoever
# needs it or not, and its int8 tells at every call that it rounds.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
