"""DPDFD: a private student from teachers, by noisy gradients of its outputs ("Model Conversion via
Differentially Private Data-Free Distillation", Liu et al., IJCAI 2024), with an accounting that holds."""
