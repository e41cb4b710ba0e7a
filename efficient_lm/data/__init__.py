"""Documents, tokenizers, packing and the loader: from text files to arrays of tokens."""
