"""What training needs around its loop, which is training/train.py: settings, data, losses, networks, run folders."""
