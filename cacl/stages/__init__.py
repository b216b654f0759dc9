"""The stages of the chain, a file each: its table of settings, its functions, its score, and the stage itself."""
