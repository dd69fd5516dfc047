"""Small things that any program needs: settings, signals, progress, processes, versions."""
