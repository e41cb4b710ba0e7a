"""What a model is: blocks of a sequence mixer and a channel mixer, stacked into a language model."""
