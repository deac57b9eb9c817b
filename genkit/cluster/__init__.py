"""The run of many workers: a driver that hands out rows, and workers, each with a device, that draw them."""
