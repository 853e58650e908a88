"""What `plan` computes: compiles a config for absent hardware, reads the program, costs it and searches settings."""
