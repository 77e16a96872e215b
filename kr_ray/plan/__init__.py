"""What a run will cost: its work from the config alone, rates measured
on the device, hours per stage (`kr plan`)."""
