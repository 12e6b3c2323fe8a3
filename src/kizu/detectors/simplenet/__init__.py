"""SimpleNet (Liu et al., CVPR 2023)."""
