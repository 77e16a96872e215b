"""Data-free distillation: a student of images that are made to please the teacher (Fang et al. 2022)."""
