"""Everything that needs Ray: Train, Tune, tasks, placement."""
