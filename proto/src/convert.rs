//! Between the native map types and their protobuf form.
