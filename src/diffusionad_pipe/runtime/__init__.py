"""What a process runs on: devices, threads, memory, progress, batches. Knows no images and no models."""
