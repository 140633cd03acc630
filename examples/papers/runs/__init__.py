"""A recipe trained from one seed or several: on the device, on the disk, and what is measured of it."""
