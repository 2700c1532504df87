"""What every stage needs: settings, errors, files, devices, signals."""
