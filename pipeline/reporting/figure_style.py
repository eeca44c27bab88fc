"""What all pictures share, in matplotlib's terms; colours are each one's own."""

STYLE = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the reader's font
    "svg.hashsalt": "diff-lmm",  # the same numbers give the same file
    "text.parse_math": False,  # names come from data; a $ in one is a dollar sign
    "font.size": 10,
    "axes.grid": True,
    "axes.formatter.useoffset": False,  # a tick shows its value, not what is to be added to it
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}
ON_WHITE = {**STYLE, "grid.color": "#e4e8ec"}
"""Of pictures that are files of their own."""
