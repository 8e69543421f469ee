"""Files and folders: what is written, recorded, locked and deleted, and the caches that others keep."""
