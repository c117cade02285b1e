"""What the hardware allows: ceilings of this machine, what each operation must move and compute, how near it comes."""
