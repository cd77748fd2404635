"""Random crops, flips and RandAugment: the part of the student's noise that changes images."""
