"""Tables: reading, encoding, and networks that learn from them as scikit-learn's estimators do."""
