"""How the tiny frozen networks are trained: `python -m recipes.small_world`; README.md beside this has the world.

One world, drawn by `stages.data.synthetic`, teaches all of them: a VAE its pictures, a diffusion transformer what of
the world goes with what, a vision tower what captions name of it, a language model how its questions are answered.
"""

import stages  # noqa: F401  # before diffusers is imported: it quiets what is logged then
