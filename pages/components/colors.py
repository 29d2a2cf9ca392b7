"""Colours with a meaning: magnitudes and changes. Those of methods are in `moesvd_core.marks`, the page's own in `theme`."""

MAGNITUDE = "Cividis"
"""Colour scale from little to much, the same to every kind of eye."""
CHANGE = "RdBu_r"
"""Diverging colour scale: blue is less, red is more; always centred on zero (`zmid=0`)."""
