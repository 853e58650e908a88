"""C++ for the CPU behind XLA's foreign function interface, compiled on first use."""
