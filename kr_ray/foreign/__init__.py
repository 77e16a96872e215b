"""Where foreign bytes enter, one module per kind of input: what
other people and tools wrote, or a disk damaged.

A reader here raises nothing but the error class it was given, in one
message that names the file and the remedy.
"""
