"""What training brings."""
