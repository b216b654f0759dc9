"""What every layer may use and no user needs: checks of arguments, files, processes, weights."""
