"""DP-MERF: a generator fitted to the noisy mean random features of every class (Harder, Adamczewski and Park,
AISTATS 2021)."""
