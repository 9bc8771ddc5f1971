"""What is not in the paper: data, recipes, run folders, speed. A reader of the paper may skip this folder."""
