"""Playing episodes: for a result, for a film, for a comparison."""
