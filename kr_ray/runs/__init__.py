"""A run's folder and what lies in it: storage, locks, artefacts, progress, results."""
