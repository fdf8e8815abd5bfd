"""What was asked and what happened: recorded data types, importers, characterisation, synthesis and samples."""
