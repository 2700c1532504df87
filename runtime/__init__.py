"""What every program needs: settings, files, devices, signals."""
