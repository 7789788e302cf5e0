//! The text form of a graph. Print → parse → print is the identity.
//!
//! ```text
//! graph @t8(%tokens: i32[T], %wanted: i32[R]) sym T<=8, R<=8 {
//!   %w0 = weight "token_embd.weight" : q6_k[4096,512]
//!   %0 = get_rows %w0, %tokens : q6_k[T,512]
//!   %1 = dequant %0 : f32[T,512]
//!   %s0 = state "blk.0.k" : f16[512,4,64] appended
//!   %c0 = const 0.5 : f32[512]
//!   %2 = mul %1, %c0 : f32[T,512]
//!   %3, %4 = fused add_rmsnorm(%x0 = %1, %x1 = %2, %x2 = %c0) : f32[T,512], f32[T,512] {
//!     %0 = add %x0, %x1 : f32[T,512]
//!     %1 = rms_norm %0, %x2 {eps=0.00001} : f32[T,512]
//!     return %0, %1
//!   }
//!   return %4, %s0
//! }
//! ```
//!
//! - Values are printed in [`Graph::order`](super::Graph::order): inputs by name, weights as `%wN`, states as `%sN`,
//!   constants as `%cN`, all else as `%N`; a number that an input has for a name is left out. Any
//!   name is read.
//! - A name with characters beyond letters, digits, `_`, `.` and `-` is quoted: `%"my input"`, `@"a b"`.
//!   Strings know the escapes `\n \r \t \0 \\ \" \'` and `\u{hex}`.
//! - A finite float is decimal, any other is its bits: `0x7f800000`.
//! - `sym` bounds the symbols. Unless told: `T<=1`, and `R` at most what `T` is.
//! - A fused node shows its body, a graph that has the kernel's name and the outer bounds.
//! - `//` and `#` start a comment, and space is free.

mod diff;
mod parse;
mod print;
#[cfg(test)]
mod tests;

pub use diff::diff;
pub use parse::ParseError;
pub use print::{At, attributes};
pub(super) use print::{lines, names};

/// Whether a name needs no quotes after `%` or `@`.
fn is_plain(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(is_name_byte)
}

fn is_name_byte(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-')
}
