# Python of 29 packages from PyPI (packages.txt; runs/ablate.sh unpacks them), in which runs/ablate.sh confirms a recipe
# that was chosen on other text. Held out are four of them, 2.4 MB: flask, xlsxwriter, babel and paramiko.
name = "packages_32k"
source = "dir:data/raw/packages"
tokenizer = "train:32768"
val_fraction = 0.1
seed = 113  # of 2,000 one of two that hold out at least four packages, 1 to 3.5 MB in all, none above 40% of it
