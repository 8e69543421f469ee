"""Running a model over many images, and the folder of what was found."""
