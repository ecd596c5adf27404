"""Image/mask pairs: any two folders, ISIC 2018, PH2, CelebAMask-HQ, chest X-ray.

The names to use are in `datamodules`; importing this package imports nothing.
"""
