# The last class has a hundredth of the first one's pictures.
variant = dict(long_tail=100.0)
