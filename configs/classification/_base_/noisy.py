# One training label in five is drawn anew from its block of five classes: the noised top-K paper's.
variant = dict(label_noise=0.2, noise="block")
