"""From the bytes of files to the batch on the device."""
