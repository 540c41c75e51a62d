"""What is measured of a backbone before any training: the moments of its layers' inputs."""
