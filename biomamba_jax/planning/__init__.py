"""The computations of `plan`: compile a config for absent hardware, read the program, cost it, search settings."""
