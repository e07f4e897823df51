"""What a sweep file can say, and how it is read."""
