"""What runs: manifests, decoding, extraction, the feature cache, datasets, training, evaluation."""

import logging

# Where bitsandbytes is installed, diffusers imports it. On some processors it then logs that there is a faster kernel,
# needed or not, and its int8 logs at every call that it rounds.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
