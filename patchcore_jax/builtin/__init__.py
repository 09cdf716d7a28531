"""What comes with the package: a drawn data set, and how the network for it was trained on drawn images.

`synthetic` draws parts with defects, `procedural` images without end; `training` learns from the latter.
"""
