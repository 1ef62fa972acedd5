"""What factors did."""
